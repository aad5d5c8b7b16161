"""What a drafter is worth, seen through the real engine: collect -> measures -> report and plots; and calibration."""
