"""Files of requests: reading, ordering, recording answers, and resuming. The caller provides the function that answers.

Must not know engines, models or HTTP.
"""
