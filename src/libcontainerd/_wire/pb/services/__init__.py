"""containerd's gRPC services."""
