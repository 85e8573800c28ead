python -m torch.distributed.run --nnodes=4 --nproc-per-node=8 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=node-0:29500 --rdzv-id=llama3-8b -m toolkit.train launch/recipes/llama3-8b.yaml
