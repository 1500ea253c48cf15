"""Storms: scripts that attack a real server for minutes, count what happens to every request, and end with figures."""
