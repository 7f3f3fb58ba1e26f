"""What a task's metrics hold, by cgroup version."""
