"""
A tiny base and instruct model, made on the spot on a CPU, and the task data to compare fine-tuning methods on them.

The quick start, the tests and the effect experiment run on it. Nothing in here is needed to fine-tune a real model.
"""
