"""The mathematics, torch only: sums, ridge least squares, gains, rank reduction, low-rank factors, intervals."""
