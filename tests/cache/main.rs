//! Cache containers against a naive model: lists of (position, key row, value row) per head.

mod errors;
mod histories;
mod lent;
mod model;
