"""Evaluation of a drafter through the real engine: collect -> measures -> report and plots; and calibration."""
