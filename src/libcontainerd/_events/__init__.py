"""Events up: from containerd's stream to the backend, in order, with nothing missed."""
