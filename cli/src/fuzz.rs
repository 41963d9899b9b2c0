//! Bodies of the fuzz targets: whatever the bytes, an error or a value, never a panic. The smoke test runs
//! them too, so that they cannot rot.

use std::io::Cursor;

use kvbudget::plan::Promise;
use kvbudget::{Dtype, Geometry, LayerShape};

use crate::commands::check;
use crate::dump::Dump;
use crate::stored::parse_plan;

/// Reads a dump, its layers and their views.
pub fn dump(bytes: &[u8]) {
    let Ok(mut dump) = Dump::new(Cursor::new(bytes)) else { return };
    for l in 0..dump.geometry().layers().len() {
        let layer = dump.layer(l, true).expect("the header was checked against the size");
        layer.view().expect("the header was checked against the format");
    }
}

/// Reads a plan and checks it against a small geometry. What is accepted survives a round trip.
pub fn plan(bytes: &[u8]) {
    let Ok(plan) = parse_plan(bytes) else { return };
    let text = serde_json::to_vec(&plan).expect("plans can be written");
    assert_eq!(plan, parse_plan(text.as_slice()).expect("what was written can be read"));
    let shape = LayerShape::new(4, 2, 8).expect("4 = 2 · 2");
    let geometry = Geometry::uniform(2, shape, Dtype::F16).expect("two layers");
    let _verdict = check::verdict(&plan, &geometry, 64, &Promise::default());
}
