//! Versioned JSON.
