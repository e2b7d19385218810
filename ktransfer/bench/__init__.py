"""`ktransfer bench`: parts of the way measured, beside what the machine can do."""
