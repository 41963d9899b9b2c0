//! What KV-cache policies and budgets cost on a real model: answers lost, likelihood lost, attention off.
//!
//! [`tasks`] makes samples from seeds, [`measure`] runs them through all variants, [`run`] spreads that over
//! processes and [`store`] keeps what they find, [`report`] draws conclusions.

pub mod bootstrap;
pub mod calibration;
mod chat;
pub mod measure;
pub mod prose;
pub mod record;
pub mod report;
pub mod run;
pub mod speed;
pub mod store;
pub mod tasks;
pub mod variant;
pub mod worker;
