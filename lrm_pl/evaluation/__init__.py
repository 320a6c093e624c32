"""Measuring trained networks: protocols by name, a record an object, tables and pages made of these."""
