"""Thin adapters between Prefect and the stages: run a stage, report it, register what came out."""
