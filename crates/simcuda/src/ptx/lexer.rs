//! PTX text to tokens, each with its line. Dots and `::` belong to words, so that `ld.global.nc.f32` and `%tid.x`
//! are one token: no other rule of the language needs them apart.

use super::LoadError;

/// A token.
#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    /// Identifier, register, opcode with its modifiers, or directive (starts with a dot).
    Word(String),
    /// Integer literal. Hexadecimal ones may use all 64 bits.
    Int(i128),
    /// `0f` literal, the bits.
    F32(u32),
    /// `0d` or decimal literal, the bits.
    F64(u64),
    /// String literal, without quotes.
    Text(String),
    /// Anything else, one character.
    Sign(char),
}

/// A token and where it stands.
#[derive(Debug, Clone)]
pub struct Spot {
    pub token: Token,
    /// 1-based.
    pub line: u32,
}

/// Splits PTX text.
pub fn lex(text: &str) -> Result<Vec<Spot>, LoadError> {
    let bytes = text.as_bytes();
    let mut spots = Vec::with_capacity(bytes.len() / 4);
    let (mut at, mut line) = (0, 1);
    while let Some(&c) = bytes.get(at) {
        let rest = &text[at..];
        let len = match c {
            b'\n' => {
                line += 1;
                1
            }
            b' ' | b'\t' | b'\r' => 1,
            b'/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            b'/' if rest.starts_with("/*") => {
                let end = rest.find("*/").ok_or_else(|| error(line, "a comment without an end"))?;
                line += rest[..end].matches('\n').count() as u32;
                end + 2
            }
            b'"' => {
                let end =
                    rest[1..].find('"').ok_or_else(|| error(line, "a string without an end"))?;
                spots.push(Spot { token: Token::Text(rest[1..=end].to_owned()), line });
                end + 2
            }
            b'0'..=b'9' => {
                let len = number_length(rest);
                let token = number(&rest[..len])
                    .ok_or_else(|| error(line, &format!("`{}` is no number", &rest[..len])))?;
                spots.push(Spot { token, line });
                len
            }
            b'.' | b'_' | b'$' | b'%' | b'a'..=b'z' | b'A'..=b'Z' => {
                let len = word(rest);
                spots.push(Spot { token: Token::Word(rest[..len].to_owned()), line });
                len
            }
            _ if c.is_ascii() => {
                spots.push(Spot { token: Token::Sign(c as char), line });
                1
            }
            _ => return Err(error(line, "PTX is ASCII outside comments")),
        };
        at += len;
    }
    Ok(spots)
}

fn error(line: u32, message: &str) -> LoadError {
    LoadError { line, message: message.to_owned() }
}

/// Length of the word at the start: letters, digits, `_ $ % .`, and `::` (as in `.L1::evict_last`).
fn word(rest: &str) -> usize {
    let bytes = rest.as_bytes();
    let mut at = 1;
    while let Some(&c) = bytes.get(at) {
        match c {
            b':' if bytes.get(at + 1) == Some(&b':') => at += 2,
            _ if c.is_ascii_alphanumeric() || b"_$%.".contains(&c) => at += 1,
            _ => break,
        }
    }
    at
}

/// Length of the number at the start, which may have a fraction and an exponent with a sign.
fn number_length(rest: &str) -> usize {
    let alphanumeric = |c: u8| c.is_ascii_alphanumeric();
    let bytes = rest.as_bytes();
    let mut len = 0;
    while let Some(&c) = bytes.get(len) {
        let exponent =
            len > 0 && matches!(bytes[len - 1], b'e' | b'E') && rest[..len].contains('.');
        if !(alphanumeric(c) || c == b'.' || (exponent && matches!(c, b'+' | b'-'))) {
            break;
        }
        len += 1;
    }
    len
}

fn number(text: &str) -> Option<Token> {
    if text.contains('.') {
        return text.parse().ok().map(|v: f64| Token::F64(v.to_bits()));
    }
    let lower = text.to_ascii_lowercase();
    if let Some(bits) = lower.strip_prefix("0f").filter(|b| b.len() == 8) {
        return u32::from_str_radix(bits, 16).ok().map(Token::F32);
    }
    if let Some(bits) = lower.strip_prefix("0d").filter(|b| b.len() == 16) {
        return u64::from_str_radix(bits, 16).ok().map(Token::F64);
    }
    let digits = lower.strip_suffix('u').unwrap_or(&lower);
    let value = if let Some(hex) = digits.strip_prefix("0x") {
        u64::from_str_radix(hex, 16)
    } else if let Some(binary) = digits.strip_prefix("0b") {
        u64::from_str_radix(binary, 2)
    } else if digits.len() > 1 && digits.starts_with('0') {
        u64::from_str_radix(digits, 8)
    } else {
        digits.parse()
    };
    value.ok().map(|v| Token::Int(v.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_their_dots() {
        let tokens: Vec<_> = lex("@!%p1 ld.global.L1::evict_last.f32 %f1, [%rd1+-4]; // x\n0f3F800000 0x10 017 /* \n */ 5U")
            .unwrap()
            .into_iter()
            .map(|s| s.token)
            .collect();
        let word = |w: &str| Token::Word(w.to_owned());
        assert_eq!(tokens[2], word("%p1"));
        assert_eq!(tokens[3], word("ld.global.L1::evict_last.f32"));
        assert_eq!(
            &tokens[tokens.len() - 4..],
            [Token::F32(0x3f80_0000), Token::Int(16), Token::Int(15), Token::Int(5)]
        );
    }

    #[test]
    fn what_cannot_be_read_names_its_line() {
        assert_eq!(lex("\n\n 0fZZ").unwrap_err().line, 3);
        assert_eq!(lex("\n\"abc").unwrap_err().line, 2);
    }
}
