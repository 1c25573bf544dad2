"""Rows and prompts: the Hub, files, pools, prompt and chat formats, batches."""
