"""SupportNet, RCM, MAM and the objective they make up."""
