"""Train dense and mixture-of-experts language models on the hardware you have."""
