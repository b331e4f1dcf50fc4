"""What `bench_gateway` is made of: its processes, its clients, and the figures that it takes from them."""
