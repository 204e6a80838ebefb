"""The models that the demo and the tests share, with what trains them and what makes them write."""
