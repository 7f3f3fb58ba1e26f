"""Calls down: the channel to containerd, its messages, and its way of naming what an Any holds."""
