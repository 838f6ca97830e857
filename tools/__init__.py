"""What one runs around a training."""
import prepare  # first: it tells an older Python, in one line
