"""Storms: scripts that put a real server under load for minutes, count how every request ends, and print figures."""
