deepspeed --no_ssh --node_rank=0 --hostfile launch/hostfile.example --master_addr node-1 --master_port 29500 --no_local_rank --module toolkit.train launch/recipes/llama3-8b.yaml
