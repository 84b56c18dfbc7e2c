"""Speed and memory of every op and model against eager PyTorch; README.md says how to read them."""
