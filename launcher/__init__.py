"""The `zeropipe` command and the composition of `deepspeed` launches."""
