"""Shipped for authors of tiers and policies: conformance suites, faults, tiny models."""
