//! What is left of one layer of one sequence, on the device: the twins of [`crate::cache`].
//!
//! Keys, values, positions and lengths live in device memory and change there: `append`, `attend` and an in-place
//! `compact` by a device selection are launches and nothing else, so that a decode step may be captured in a graph and
//! replayed while lengths grow. The host knows capacities; `lens`, `positions` and everything that needs them wait for
//! the stream and read back.
//!
//! Rows lie in memory of ours, or in an engine's: [`PagePool::lent`] and [`PagedCache::adopt`] work in place in the
//! engine's pool, and `attend` writes to the engine's rows ([`RowsMut`](super::RowsMut)).
//!
//! An error leaves everything as it was. What only the device can see, tokens without room, changes nothing there
//! either, and is counted: [`FlatCache::check`] tells.

mod attend;
mod batch;
mod flat;
mod paged;
mod paging;
mod pool;
mod recompress;
mod slots;
mod snapshot;
mod thin;

pub use attend::Workspace;
pub use batch::{Batch, Member};
pub use flat::FlatCache;
pub use paged::PagedCache;
pub use pool::PagePool;
pub use recompress::{Recompress, Recompression, Share};
pub use snapshot::Snapshot;
pub use thin::Order;
