"""Models of plain rows: linear regression and gradient-boosted trees."""
