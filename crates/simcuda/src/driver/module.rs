//! Modules: PTX text loaded into a context, its kernels and variables.

use std::fs;
use std::sync::Arc;

use super::abi::{In, Out, Text};
use super::attributes::SHARED;
use super::device::{self, Device};
use super::finding;
use super::handle::{Handle, Kind};
use super::init::PTX_VERSION;
use super::status::{Cu, Status};
use crate::Class;
use crate::ptx;

/// The newest `.target` that an H100 runs.
const TARGET: u32 = 90;

/// What tasks keep of a module.
pub struct Loadable {
    pub handle: Handle,
    pub module: ptx::Module,
}

/// A loaded module.
pub struct Loaded {
    pub context: Handle,
    pub content: Arc<Loadable>,
    /// Address of each variable.
    pub addresses: Vec<u64>,
}

/// A kernel as a CUfunction.
pub struct Function {
    pub context: Handle,
    pub module: Arc<Loadable>,
    pub kernel: usize,
    /// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
    pub max_dynamic_shared: u32,
    /// CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT.
    pub carveout: i32,
}

impl Function {
    pub fn kernel(&self) -> &ptx::Kernel {
        &self.module.module.kernels[self.kernel]
    }
}

/// `.version` of a PTX text, wherever comments leave it.
fn version(text: &str) -> Option<(u32, u32)> {
    let line =
        text.lines().find_map(|line| line.split("//").next()?.trim().strip_prefix(".version"))?;
    let (major, minor) = line.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

impl Device {
    /// Refuses an image, with the reason in a report and on stderr: a CUresult alone says too little.
    fn refuse_image(&mut self, status: Status, reason: String) -> Status {
        eprintln!("simcuda: {reason}");
        self.log.reports.push(finding(Class::Unsupported, reason));
        status
    }

    fn load(&mut self, context: Handle, image: &[u8]) -> Cu<Handle> {
        if image.starts_with(b"\x7fELF") || image.starts_with(&[0x50, 0xed, 0x55, 0xba]) {
            return Err(self.refuse_image(
                Status::INVALID_IMAGE,
                "expected PTX text, got a cubin or fatbin".into(),
            ));
        }
        let Ok(text) = std::str::from_utf8(image) else {
            return Err(self.refuse_image(
                Status::INVALID_IMAGE,
                "expected PTX text, got what is not UTF-8".into(),
            ));
        };
        if let Some(version) = version(text).filter(|&version| version > PTX_VERSION) {
            let reason = format!(
                "PTX {}.{} is newer than the emulated driver's {}.{}",
                version.0, version.1, PTX_VERSION.0, PTX_VERSION.1
            );
            return Err(self.refuse_image(Status::UNSUPPORTED_PTX_VERSION, reason));
        }
        let mut module = match ptx::Module::load(text) {
            Ok(module) => module,
            Err(error) => {
                let reason = format!("PTX line {}: {}", error.line, error.message);
                return Err(self.refuse_image(Status::INVALID_PTX, reason));
            }
        };
        if module.target > TARGET {
            let reason = format!("PTX for sm_{}, the device is sm_{TARGET}", module.target);
            return Err(self.refuse_image(Status::INVALID_PTX, reason));
        }
        let mut addresses = Vec::with_capacity(module.variables.len());
        for variable in &module.variables {
            let bytes = u64::from(variable.bytes.max(1));
            addresses.push(self.allocate(context, bytes, None, true)?);
        }
        module.place(&addresses); // initialisers may hold addresses of variables
        for (variable, &at) in module.variables.iter().zip(&addresses) {
            let order = self.host_order("module load");
            if let Err(fault) = self.memory.write(at, &variable.init, &order) {
                return Err(self.refuse_image(Status::UNKNOWN, fault.message));
            }
        }
        let handle = self.handle(Kind::Module);
        let content = Arc::new(Loadable { handle, module });
        self.modules.insert(handle, Loaded { context, content, addresses });
        Ok(handle)
    }

    /// The handle of a kernel: the same each time.
    fn find_function(&mut self, module: Handle, name: &str) -> Cu<Handle> {
        let loaded = self.modules.get(&module).ok_or(Status::INVALID_HANDLE)?;
        let (context, content) = (loaded.context, loaded.content.clone());
        let kernels = &content.module.kernels;
        let kernel = kernels.iter().position(|k| k.name == name).ok_or(Status::NOT_FOUND)?;
        let same = |f: &Function| f.module.handle == module && f.kernel == kernel;
        if let Some((&known, _)) = self.functions.iter().find(|(_, f)| same(f)) {
            return Ok(known);
        }
        let function = Function {
            context,
            kernel,
            max_dynamic_shared: SHARED.saturating_sub(kernels[kernel].shared_bytes),
            carveout: -1,
            module: content,
        };
        let handle = self.handle(Kind::Function);
        self.functions.insert(handle, function);
        Ok(handle)
    }

    pub fn function(&self, function: Handle) -> Cu<&Function> {
        let found = self.functions.get(&function).ok_or(Status::INVALID_HANDLE)?;
        self.usable(found.context)?;
        Ok(found)
    }
}

fn load(module: &Out<Handle>, image: &[u8]) -> Cu {
    module.check()?;
    let (mut device, context) = device::current()?;
    let loaded = device.load(context, image)?;
    module.set(loaded)
}

/// Locks the device of a module and finds it.
fn module_locked(module: Handle) -> Cu<std::sync::MutexGuard<'static, Device>> {
    let device = device::owner(module, Kind::Module)?;
    let context = device.modules.get(&module).ok_or(Status::INVALID_HANDLE)?.context;
    device.usable(context)?;
    Ok(device)
}

entries! {
    fn cuModuleLoad(module: Out<Handle>, path: Text) {
        let image = fs::read(path.get()?).map_err(|_| Status::FILE_NOT_FOUND)?;
        load(&module, image.split(|&byte| byte == 0).next().unwrap_or_default())
    }

    fn cuModuleLoadData(module: Out<Handle>, image: Text) {
        load(&module, image.bytes()?)
    }

    /// Options are for a compiler that is not here.
    fn cuModuleLoadDataEx(
        module: Out<Handle>, image: Text, _options: u32, _names: In<u32>, _values: In<u64>
    ) {
        load(&module, image.bytes()?)
    }

    fn cuModuleUnload(module: Handle) {
        let mut device = module_locked(module)?;
        let context = device.modules[&module].context;
        device.finish(context);
        if let Some(loaded) = device.modules.remove(&module) {
            device.functions.retain(|_, function| function.module.handle != module);
            for at in loaded.addresses {
                device.release(at);
            }
        }
        device.usable(context)
    }

    fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: Text) {
        function.check()?;
        let mut device = module_locked(module)?;
        function.set(device.find_function(module, name.get()?)?)
    }

    fn cuModuleGetGlobal_v2(address: Out<u64>, bytes: Out<usize>, module: Handle, name: Text) {
        let name = name.get()?;
        let device = module_locked(module)?;
        let loaded = &device.modules[&module];
        let variables = &loaded.content.module.variables;
        let index = variables.iter().position(|variable| variable.name == name);
        let index = index.ok_or(Status::NOT_FOUND)?;
        address.set_if_wanted(loaded.addresses[index]);
        bytes.set_if_wanted(variables[index].bytes as usize);
        Ok(())
    }

    fn cuFuncGetModule(module: Out<Handle>, function: Handle) {
        let device = device::owner(function, Kind::Function)?;
        module.set(device.function(function)?.module.handle)
    }
}
