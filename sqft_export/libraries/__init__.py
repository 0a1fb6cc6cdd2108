"""Private parts of other libraries that this package needs, one module per library.

A part is private if its library does not document it. It may change in any release. No other module
uses such a part. ``PRIVATE`` of each module lists the names; a test looks each of them up.
"""
