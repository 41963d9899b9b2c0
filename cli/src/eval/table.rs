//! Results as a table for people: a block per budget, a line per policy, the best of each block marked.

use std::io::{self, Write};

use super::{Results, Row};
use crate::commands::bytes;

/// Prints all rows, grouped by budget, best output error first.
pub fn print(results: &Results, out: &mut dyn Write) -> io::Result<()> {
    let dump = &results.dump;
    writeln!(
        out,
        "{}: {} layers, {} kv heads, {} tokens, {}; full cache {} slots, {}",
        dump.name,
        dump.layers,
        dump.kv_heads,
        dump.tokens,
        dump.dtype,
        dump.full_slots,
        bytes(dump.full_bytes)
    )?;
    writeln!(
        out,
        "output error: relative L2 of the attention output of the next {} tokens' queries, head by head;\n\
         layer error: the same behind the output projection, all heads together; * = best",
        dump.next_tokens
    )?;
    let policy = results.rows.iter().map(|r| r.policy.len()).max().unwrap_or(0).max(6);
    for block in results.rows.chunk_by(|a, b| a.budget == b.budget) {
        writeln!(
            out,
            "\nbudget {}\n{:policy$}  {:>9}  {:>10}  {:>9}   {:>10}   {:>8}   {:>11}   {:>10}",
            block[0].budget,
            "policy",
            "slots",
            "size",
            "mass kept",
            "mean error",
            "p95",
            "layer error",
            "planned in"
        )?;
        let mut rows: Vec<&Row> = block.iter().collect();
        rows.sort_by(|a, b| a.output_error.mean.total_cmp(&b.output_error.mean));
        let best = |value: fn(&Row) -> f64| {
            block.iter().map(value).min_by(f64::total_cmp).unwrap_or(f64::NAN)
        };
        let layer_error = |r: &Row| r.layer_error.unwrap_or(f64::INFINITY);
        let mark = |row: &Row, value: fn(&Row) -> f64| {
            if value(row) == best(value) { '*' } else { ' ' }
        };
        for row in rows {
            writeln!(
                out,
                "{:policy$}  {:>9}  {:>10}  {:>8.2}%{}  {:>10.4}{}  {:>8.4}{}  {:>11}{}  {:>7.1} ms",
                row.policy,
                row.slots,
                bytes(row.bytes),
                row.retained_mass * 100.0,
                mark(row, |r| -r.retained_mass),
                row.output_error.mean,
                mark(row, |r| r.output_error.mean),
                row.output_error.p95,
                mark(row, |r| r.output_error.p95),
                row.layer_error.map_or("-".to_owned(), |e| format!("{e:.4}")),
                if row.layer_error.is_some() { mark(row, layer_error) } else { ' ' },
                row.plan_seconds * 1e3,
            )?;
        }
    }
    Ok(())
}
