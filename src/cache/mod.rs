//! What is left of one layer of one sequence, on the host: compacted keys and values, and their positions.
//!
//! [`FlatCache`] holds the rows of all KV heads back to back, `[Σ capacity(h), D]`, as variable-length
//! attention reads them. [`PagedCache`] holds pages of `[P, D]` rows per head, out of a [`PagePool`] that
//! many layers and sequences share. Both are filled by `gather` (out of place, from any borrowed layout; `regather` into memory that is there),
//! thinned by `compact` (in place), extended by `append`, and lent for scoring and attention by `view` and
//! `attend_view`. A batch holds many of them.
//!
//! Rows of a head stay ascending by position. An error leaves everything as it was, and `append` and
//! `compact` allocate nothing. A cache does not know its layer: its errors name layer 0. Work runs in the
//! caller's current rayon pool.

mod buffer;
mod flat;
mod paged;
pub(crate) mod pages;
mod pool;
pub(crate) mod slots;
mod source;

pub use flat::FlatCache;
pub use paged::PagedCache;
pub use pages::Pages;
pub use pool::PagePool;
