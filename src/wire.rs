//! What every file of this crate says of itself: its format and its version.

/// Refuses other formats and versions: they would be misread.
pub(crate) fn expect(expected: (&str, u32), got: (&str, u32)) -> Result<(), String> {
    if expected == got {
        return Ok(());
    }
    let ((format, version), (got, of)) = (expected, got);
    Err(format!("expected format {format:?} version {version}, got {got:?} version {of}"))
}
