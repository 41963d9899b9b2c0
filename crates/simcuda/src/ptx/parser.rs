//! Tokens to statements. Knows the grammar of directives and operands, and no instruction: opcodes are words here.

use super::LoadError;
use super::ast::{
    File, Function, Guard, Instruction, Operand, Place, Space, Statement, Type, Variable,
};
use super::lexer::{Spot, Token, lex};

type Result<T> = std::result::Result<T, LoadError>;

/// Parses a PTX file.
pub fn parse(text: &str) -> Result<File> {
    let spots = lex(text)?;
    let mut parser = Parser { spots: &spots, at: 0, source: (0, 0), file: File::default() };
    parser.file()?;
    Ok(parser.file)
}

struct Parser<'a> {
    spots: &'a [Spot],
    at: usize,
    /// The last `.loc`.
    source: (u32, u32),
    file: File,
}

impl Parser<'_> {
    fn file(&mut self) -> Result<()> {
        while self.at < self.spots.len() {
            let word = self.word()?;
            match word.as_str() {
                ".version" => {
                    let Token::F64(bits) = self.next()? else {
                        return Err(self.error("a `.version` like 8.0"));
                    };
                    let tenths = (f64::from_bits(bits) * 10.0).round() as u32;
                    self.file.version = (tenths / 10, tenths % 10);
                }
                ".target" => {
                    let name = self.word()?;
                    let number =
                        name.strip_prefix("sm_").map(|n| n.trim_end_matches(char::is_alphabetic));
                    self.file.target = number
                        .and_then(|n| n.parse().ok())
                        .ok_or_else(|| self.error(&format!("a target like sm_80, got {name}")))?;
                    while self.sign(',') {
                        self.word()?;
                    }
                }
                ".address_size" => {
                    let bits = self.int()?;
                    if bits != 64 {
                        return Err(self.error(&format!("`.address_size 64`, got {bits}")));
                    }
                }
                ".visible" | ".weak" | ".common" => {}
                ".extern" => self.extern_()?,
                ".entry" | ".func" => {
                    let function = self.function(word == ".entry")?;
                    self.file.functions.push(function);
                }
                ".file" => self.source_file()?,
                ".loc" => self.loc()?,
                ".section" => self.section()?,
                ".global" | ".const" | ".shared" => {
                    let variable = self.variable(&word, false)?;
                    self.expect(';')?;
                    self.file.variables.push(variable);
                }
                ".pragma" => self.pragma()?,
                _ => return Err(self.unsupported("directive", &word)),
            }
        }
        if self.file.version == (0, 0) {
            return Err(self.error("`.version` at the start of the file"));
        }
        Ok(())
    }

    fn extern_(&mut self) -> Result<()> {
        let word = self.word()?;
        if word == ".func" {
            let function = self.function(false)?;
            self.file.functions.push(function);
        } else {
            let variable = self.variable(&word, true)?;
            self.expect(';')?;
            self.file.variables.push(variable);
        }
        Ok(())
    }

    fn function(&mut self, entry: bool) -> Result<Function> {
        let line = self.line();
        let results =
            if !entry && self.peek(&Token::Sign('(')) { self.formals()? } else { Vec::new() };
        let name = self.word()?;
        let params = if self.peek(&Token::Sign('(')) { self.formals()? } else { Vec::new() };
        let mut max_threads = None;
        loop {
            match self.next()? {
                Token::Sign(';') => {
                    return Ok(Function {
                        entry,
                        name,
                        results,
                        params,
                        max_threads,
                        body: None,
                        line,
                    });
                }
                Token::Sign('{') => break,
                Token::Word(w) => match w.as_str() {
                    ".maxntid" | ".reqntid" => {
                        let mut size = [1; 3];
                        for (i, n) in self.ints()?.into_iter().enumerate().take(3) {
                            size[i] = n as u32;
                        }
                        max_threads = Some(size);
                    }
                    // Advice to ptxas about registers: nothing here depends on it.
                    ".minnctapersm" | ".maxnreg" | ".maxnctapersm" => {
                        self.ints()?;
                    }
                    ".noreturn" => {}
                    ".pragma" => self.pragma()?,
                    _ => return Err(self.unsupported("function attribute", &w)),
                },
                other => return Err(self.error(&format!("a function body or `;`, got {other:?}"))),
            }
        }
        self.source = (0, 0);
        let body = self.body()?;
        Ok(Function { entry, name, results, params, max_threads, body: Some(body), line })
    }

    fn formals(&mut self) -> Result<Vec<Variable>> {
        self.expect('(')?;
        let mut formals = Vec::new();
        while !self.sign(')') {
            let space = self.word()?;
            if space != ".param" {
                return Err(self.error(&format!("`.param` in a parameter list, got {space}")));
            }
            formals.push(self.variable(&space, false)?);
            self.sign(',');
        }
        Ok(formals)
    }

    fn body(&mut self) -> Result<Vec<Statement>> {
        let mut statements = Vec::new();
        let mut depth = 0;
        loop {
            let line = self.line();
            match self.next()? {
                Token::Sign('}') if depth == 0 => return Ok(statements),
                Token::Sign('}') => {
                    depth -= 1;
                    statements.push(Statement::Close);
                }
                Token::Sign('{') => {
                    depth += 1;
                    statements.push(Statement::Open);
                }
                Token::Sign('@') => {
                    let negate = self.sign('!');
                    let register = self.word()?;
                    let opcode = self.word()?;
                    let guard = Some(Guard { register, negate });
                    statements.push(self.instruction(guard, opcode, line)?);
                }
                Token::Word(word) => match word.as_str() {
                    ".reg" => statements.push(self.registers()?),
                    ".shared" | ".local" | ".param" | ".global" | ".const" => {
                        let variable = self.variable(&word, false)?;
                        self.expect(';')?;
                        statements.push(Statement::Variable(variable));
                    }
                    ".loc" => self.loc()?,
                    ".pragma" => self.pragma()?,
                    _ if word.starts_with('.') => return Err(self.unsupported("directive", &word)),
                    _ if self.sign(':') => statements.push(Statement::Label(word)),
                    _ => statements.push(self.instruction(None, word, line)?),
                },
                other => return Err(self.error(&format!("a statement, got {other:?}"))),
            }
        }
    }

    fn instruction(
        &mut self,
        guard: Option<Guard>,
        opcode: String,
        line: u32,
    ) -> Result<Statement> {
        let mut operands = Vec::new();
        while !self.sign(';') {
            if !operands.is_empty() {
                self.expect(',')?;
            }
            operands.push(self.operand()?);
        }
        let place = Place { line, source: self.source };
        Ok(Statement::Instruction(Instruction { guard, opcode, operands, place }))
    }

    fn operand(&mut self) -> Result<Operand> {
        Ok(match self.next()? {
            Token::Word(name) if self.sign('|') => Operand::Pair(name, self.word()?),
            Token::Word(name) if self.sign('+') => Operand::Offset(name, self.int()? as i64),
            Token::Word(name) => Operand::Name(name),
            Token::Int(value) => Operand::Int(value),
            Token::F32(bits) => Operand::F32(bits),
            Token::F64(bits) => Operand::F64(bits),
            Token::Sign('-') => match self.next()? {
                Token::Int(value) => Operand::Int(-value),
                Token::F64(bits) => Operand::F64((-f64::from_bits(bits)).to_bits()),
                other => return Err(self.error(&format!("a number, got {other:?}"))),
            },
            Token::Sign('!') => Operand::Not(self.word()?),
            Token::Sign('[') => self.address()?,
            Token::Sign('{') => Operand::Vector(self.operands_until('}')?),
            Token::Sign('(') => Operand::List(self.operands_until(')')?),
            other => return Err(self.error(&format!("an operand, got {other:?}"))),
        })
    }

    fn operands_until(&mut self, end: char) -> Result<Vec<Operand>> {
        let mut operands = Vec::new();
        while !self.sign(end) {
            operands.push(self.operand()?);
            self.sign(',');
        }
        Ok(operands)
    }

    /// What follows `[`.
    fn address(&mut self) -> Result<Operand> {
        let base = match self.spots.get(self.at).map(|s| &s.token) {
            Some(Token::Word(_)) => Some(self.word()?),
            _ => None,
        };
        let mut offset = 0;
        while !self.sign(']') {
            self.sign('+');
            let sign = if self.sign('-') { -1 } else { 1 };
            offset += sign * self.int()?;
        }
        let offset = i64::try_from(offset).map_err(|_| self.error("an offset of 64 bits"))?;
        Ok(Operand::Address(base, offset))
    }

    /// `.reg .f32 %f<4>, %x;`
    fn registers(&mut self) -> Result<Statement> {
        let kind = self.word()?;
        let kind = kind
            .strip_prefix('.')
            .and_then(Type::parse)
            .ok_or_else(|| self.unsupported("register type", &kind))?;
        let mut names = Vec::new();
        loop {
            let name = self.word()?;
            if self.sign('<') {
                let count = self.int()?;
                self.expect('>')?;
                names.extend((0..count).map(|i| format!("{name}{i}")));
            } else {
                names.push(name);
            }
            if self.sign(';') {
                return Ok(Statement::Registers(kind, names));
            }
            self.expect(',')?;
        }
    }

    /// What follows the state space: `.align 16 .b8 name[64] = {…}`.
    fn variable(&mut self, space: &str, extern_: bool) -> Result<Variable> {
        let space = match space {
            ".global" => Space::Global,
            ".const" => Space::Const,
            ".shared" => Space::Shared,
            ".local" => Space::Local,
            ".param" => Space::Param,
            _ => return Err(self.unsupported("state space", space)),
        };
        let mut align = None;
        let mut vector = 1;
        let (element, name) = loop {
            let word = self.word()?;
            match word.as_str() {
                ".align" => align = Some(self.int()? as u32),
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                // Attributes of pointer parameters.
                ".ptr" | ".global" | ".const" | ".shared" | ".local" if space == Space::Param => {}
                _ => match word.strip_prefix('.').map(Type::parse) {
                    Some(Some(element)) => break (element.bytes * vector, self.word()?),
                    _ => return Err(self.unsupported("variable attribute", &word)),
                },
            }
        };
        let mut bytes = element;
        while self.sign('[') {
            if self.sign(']') {
                bytes = 0;
            } else {
                let n = u32::try_from(self.int()?).ok().and_then(|n| bytes.checked_mul(n));
                bytes = n.ok_or_else(|| self.error("a variable of less than 4 GiB"))?;
                self.expect(']')?;
            }
        }
        let mut init_names = Vec::new();
        let init =
            if self.sign('=') { self.initialiser(element, &mut init_names)? } else { Vec::new() };
        let align = align.unwrap_or(element);
        Ok(Variable { space, name, align, bytes, extern_, init, init_names })
    }

    fn initialiser(&mut self, element: u32, names: &mut Vec<(u32, String)>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut depth = 0;
        loop {
            match self.next()? {
                Token::Sign('{') => depth += 1,
                Token::Sign('}') => depth -= 1,
                Token::Sign(',') => {}
                Token::Sign('-') => {
                    let value = -self.int()?;
                    bytes.extend_from_slice(&value.to_le_bytes()[..element as usize]);
                }
                Token::Int(value) => {
                    bytes.extend_from_slice(&value.to_le_bytes()[..element as usize])
                }
                Token::F32(bits) => bytes.extend_from_slice(&bits.to_le_bytes()),
                Token::F64(bits) => bytes.extend_from_slice(&bits.to_le_bytes()),
                Token::Word(name) if name == "generic" => {
                    self.expect('(')?;
                    let name = self.word()?;
                    self.expect(')')?;
                    names.push((bytes.len() as u32, name));
                    bytes.extend_from_slice(&[0; 8]);
                }
                Token::Word(name) => {
                    names.push((bytes.len() as u32, name));
                    bytes.extend_from_slice(&[0; 8]);
                }
                other => return Err(self.error(&format!("an initialiser, got {other:?}"))),
            }
            if depth == 0 {
                return Ok(bytes);
            }
        }
    }

    /// `.file 1 "x.cu"`, with time stamp and size if the compiler gives them.
    fn source_file(&mut self) -> Result<()> {
        let number = self.int()? as u32;
        let Token::Text(name) = self.next()? else {
            return Err(self.error("a file name after `.file`"));
        };
        self.file.sources.push((number, name));
        while self.sign(',') {
            self.int()?;
        }
        Ok(())
    }

    /// `.loc 1 20 3, function_name $L__info_string0, inlined_at 1 40 5`.
    fn loc(&mut self) -> Result<()> {
        self.source = (self.int()? as u32, self.int()? as u32);
        self.int()?;
        while self.sign(',') {
            match self.word()?.as_str() {
                "function_name" => {
                    self.word()?;
                    if self.sign('+') {
                        self.int()?;
                    }
                }
                "inlined_at" => {
                    for _ in 0..3 {
                        self.int()?;
                    }
                }
                other => return Err(self.unsupported("attribute of .loc", other)),
            }
        }
        Ok(())
    }

    /// Debug sections hold nothing that runs.
    fn section(&mut self) -> Result<()> {
        self.word()?;
        self.expect('{')?;
        let mut depth = 1;
        while depth > 0 {
            match self.next()? {
                Token::Sign('{') => depth += 1,
                Token::Sign('}') => depth -= 1,
                _ => {}
            }
        }
        Ok(())
    }

    fn pragma(&mut self) -> Result<()> {
        while !self.sign(';') {
            self.next()?;
        }
        Ok(())
    }

    fn ints(&mut self) -> Result<Vec<i128>> {
        let mut ints = vec![self.int()?];
        while self.sign(',') {
            ints.push(self.int()?);
        }
        Ok(ints)
    }

    fn next(&mut self) -> Result<Token> {
        let spot =
            self.spots.get(self.at).ok_or_else(|| self.error("more text: the file ends early"))?;
        self.at += 1;
        Ok(spot.token.clone())
    }

    fn word(&mut self) -> Result<String> {
        match self.next()? {
            Token::Word(word) => Ok(word),
            other => Err(self.error(&format!("a word, got {other:?}"))),
        }
    }

    fn int(&mut self) -> Result<i128> {
        match self.next()? {
            Token::Int(value) => Ok(value),
            other => Err(self.error(&format!("a number, got {other:?}"))),
        }
    }

    fn peek(&self, token: &Token) -> bool {
        self.spots.get(self.at).is_some_and(|s| s.token == *token)
    }

    /// Takes a sign if it comes next.
    fn sign(&mut self, sign: char) -> bool {
        let found = self.peek(&Token::Sign(sign));
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, sign: char) -> Result<()> {
        if self.sign(sign) {
            return Ok(());
        }
        let got = self.spots.get(self.at).map(|s| &s.token);
        Err(self.error(&format!("`{sign}`, got {got:?}")))
    }

    /// Line of the next token, or of the last.
    fn line(&self) -> u32 {
        self.spots.get(self.at).or(self.spots.last()).map_or(1, |s| s.line)
    }

    fn error(&self, expected: &str) -> LoadError {
        let last = self.spots.get(self.at.saturating_sub(1)).map_or(1, |s| s.line);
        LoadError { line: last, message: format!("expected {expected}") }
    }

    fn unsupported(&self, what: &str, name: &str) -> LoadError {
        LoadError { message: format!("unsupported {what} `{name}`"), ..self.error("") }
    }
}
