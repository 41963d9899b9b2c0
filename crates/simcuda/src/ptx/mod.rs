//! PTX text to decoded kernels: INTERFACE for the driver.

/// A loaded module.
pub struct Module {
    /// `.version`, major and minor.
    pub version: (u32, u32),
    /// `.target`, the number: 80 for sm_80.
    pub target: u32,
    pub kernels: Vec<Kernel>,
    /// `.global` and `.const` variables.
    pub variables: Vec<Variable>,
}

/// An `.entry`.
pub struct Kernel {
    pub name: String,
    pub params: Vec<Param>,
    /// Bytes of all parameters.
    pub param_bytes: u32,
    /// Bytes of statically declared `.shared` variables.
    pub shared_bytes: u32,
    pub local_bytes: u32,
    /// `.maxntid`, if given.
    pub max_threads: Option<[u32; 3]>,
    /// Registers per thread: from ptxas through a `// simcuda registers NAME N` comment line anywhere in the text, or an estimate.
    pub registers: u32,
}

pub struct Param {
    pub name: String,
    pub offset: u32,
    pub bytes: u32,
}

pub struct Variable {
    pub name: String,
    pub constant: bool,
    pub align: u32,
    pub bytes: u32,
    /// Zero where the initialiser is short. None: uninitialised is zero too, by the PTX ISA.
    pub init: Vec<u8>,
}

/// Why a module was refused.
#[derive(Debug)]
pub struct LoadError {
    /// 1-based line of the PTX text.
    pub line: u32,
    /// Names what was expected and what came, quotes the line.
    pub message: String,
}

impl Module {
    /// Parses, checks operand types and decodes. Unknown directives, opcodes or modifiers are errors.
    pub fn load(text: &str) -> Result<Self, LoadError> {
        todo!()
    }

    /// Gives the variables their addresses before the first launch; kernels refer to them by index.
    pub fn place(&mut self, addresses: &[u64]) {
        todo!()
    }
}
