"""Simulation of several nodes on one journal: real leaders and standbys, each with its own clocks, disk and network."""
