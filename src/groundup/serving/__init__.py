"""A model answering over HTTP. A request's way: `server.Gate` (may it come in) -> `inputs` (what it holds) -> `service` (pictures are decoded, in
threads) -> `batcher` (what waits is one forward pass, in one thread) -> answers. `limits.py`: what is refused, and the words for it."""
