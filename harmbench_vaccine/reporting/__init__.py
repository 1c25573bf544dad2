"""Printed output: tables, leaderboards, plug-in pages, the dry run, published figures."""
