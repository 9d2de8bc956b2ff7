"""What runs the processes of jobs: environments of their own, groups that end together, folders that go
away."""
