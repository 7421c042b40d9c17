"""What the installed package registers with vLLM and with pluggy, and nothing else."""
