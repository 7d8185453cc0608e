"""Files of requests, answered by whoever is asked: reading, ordering, recording and resuming.

Must not know engines, models or HTTP.
"""
