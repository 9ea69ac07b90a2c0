"""What tokalign uses of its dependencies without their promise: one file a dependency, named after it.

Private names, and modules that a dependency does not document, may change in any release. They are imported and wrapped
here, and those that are reached by inheritance are listed here, so that a new release is read against a few pages.
tests/contracts/ holds each file, and says when another file of tokalign touches such a name.
"""
