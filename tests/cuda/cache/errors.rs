//! Bad input is an error that names its cause, and nothing has changed after it.
