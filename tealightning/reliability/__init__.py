"""Runs that survive: exact resume, deadlines, dead ranks, full disks, folders used twice."""
