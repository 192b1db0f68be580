"""Collects reports, shows the fleet, and drives waves."""
