"""SupportNet, RCM, MAM, the baselines SEAM and PPC, and the objective they make up."""
