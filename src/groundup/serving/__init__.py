"""A model answering over HTTP: `server.py` the application, `batcher.py` many requests in one forward pass, `page.html` what a browser shows."""
