//! Builds the guest's images with the system C compiler.
//!
//! Story: three steps for each image of [`IMAGES`]. 1. The user programs are linked by themselves. 2. Each kernel file is
//! compiled; the programs come in by `.incbin`. 3. The kernel is linked. An image that differs from the plain one in a few
//! files shares all other objects with it.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

#[path = "src/abi.rs"]
mod abi;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// One image: the kernel, with `variant` applied.
struct Image {
    name: &'static str,
    variant: Variant,
}

/// How an image differs from the kernel as it is.
enum Variant {
    /// Not at all.
    None,
    /// `file` is compiled with `define`.
    Define { file: &'static str, define: &'static str },
    /// `file` is left out.
    Without { file: &'static str },
}

const IMAGES: &[Image] = &[
    Image { name: "pager", variant: Variant::None },
    Image { name: "pager-twin", variant: Variant::Define { file: "witness.c", define: "WITNESS_TWIN" } },
    Image { name: "pager-zeros", variant: Variant::Define { file: "swap.c", define: "SWAP_TWIN=1" } },
    Image { name: "pager-other", variant: Variant::Define { file: "swap.c", define: "SWAP_TWIN=2" } },
    Image { name: "pager-no-scope", variant: Variant::Define { file: "file.c", define: "FILE_TWIN" } },
    Image { name: "pager-plain", variant: Variant::Without { file: "note.S" } },
];

/// A user program, linked of these files, `start.S` and `user.c`.
struct Program {
    name: &'static str,
    files: &'static [&'static str],
}

const PROGRAMS: &[Program] = &[
    Program { name: "hello", files: &["hello.c"] },
    Program { name: "mm", files: &["mm.c"] },
    Program { name: "access", files: &["access.c"] },
    Program { name: "spin", files: &["spin.c", "spin_loop.S"] },
    Program { name: "sweep", files: &["sweep.c", "sweep_loops.S"] },
    Program { name: "storm", files: &["storm.c"] },
    Program { name: "fpu", files: &["fpu.c", "fpu_loop.S"] },
    Program { name: "fpu_fresh", files: &["fpu_fresh.c"] },
    Program { name: "reclaim", files: &["reclaim.c", "reclaim_pattern.c"] },
    Program { name: "shoot", files: &["shoot.c"] },
    Program { name: "age", files: &["age.c"] },
    Program {
        name: "mix",
        files: &[
            "mix.c",
            "mix_random.c",
            "mix_text.c",
            "mix_hash.c",
            "mix_lz.c",
            "mix_sort.c",
            "mix_vm.c",
            "mix_matrix.c",
        ],
    },
];

/// No FPU, no position-independent code, nothing that a hosted C would add. Stores are not merged, because a merged store to
/// bytes may cross a page (see string.c); loops are not turned into calls, because early.c has nobody to call.
const FLAGS: &[&str] = &[
    "-m32",
    "-march=i686",
    "-mtune=generic",
    "-mgeneral-regs-only",
    "-std=gnu11",
    "-O2",
    "-ffreestanding",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-strict-aliasing",
    "-fno-store-merging",
    "-fno-tree-loop-distribute-patterns",
    "-fno-common",
    "-fcf-protection=none",
    "-Wall",
    "-Wextra",
    "-Wmissing-prototypes",
    "-Wvla",
    "-Werror",
];

const LINK_FLAGS: &[&str] = &[
    "-m32",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=4096",
    "-Wl,-z,noexecstack",
];

/// Arguments in registers, as other kernels for this CPU have them. traps.S and its like know.
const KERNEL_CALLS: &str = "-mregparm=3";

/// For the program whose stack the kernel's sampler walks.
const FRAME_POINTERS: &[&str] = &["-fno-omit-frame-pointer", "-mno-omit-leaf-frame-pointer"];

/// Where things are, and which compiler.
struct Tree {
    kernel: PathBuf,
    user: PathBuf,
    out: PathBuf,
    compiler: String,
}

fn main() {
    if let Err(error) = build() {
        println!("cargo::error={error}");
        std::process::exit(1);
    }
}

fn build() -> Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let tree = Tree {
        kernel: root.join("src/kernel"),
        user: root.join("src/user"),
        out: PathBuf::from(env::var("OUT_DIR")?),
        compiler: env::var("UMBRA_GUEST_CC").unwrap_or_else(|_| "cc".to_owned()),
    };
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/abi.rs");
    println!("cargo::rerun-if-changed=src/kernel");
    println!("cargo::rerun-if-changed=src/user");
    println!("cargo::rerun-if-env-changed=UMBRA_GUEST_CC");
    fs::write(tree.out.join("umbra_abi.h"), abi_header())?;
    for program in PROGRAMS {
        tree.link_program(program)?;
    }
    let objects = tree.compile_kernel()?;
    IMAGES.iter().try_for_each(|image| tree.link_image(image, &objects))
}

/// `src/abi.rs` for C and for the assembler.
fn abi_header() -> String {
    let mut header = String::from("/* Made by build.rs from src/abi.rs. */\n");
    let mut define = |name: &str, value: u32| {
        writeln!(header, "#define {name} {value:#x}").expect("writing to a string");
    };
    macro_rules! constants {
        ($($name:ident)*) => { $(define(stringify!($name), u32::from(abi::$name));)* };
    }
    constants! {
        DEBUG_EXIT_PORT STATUS_PASS STATUS_FAIL STATUS_COMMAND_LINE STATUS_PANIC
        NOTE_TYPE_KERNEL NOTE_TYPE_WITNESS NOTE_VERSION NOTE_FLAG_CLEAN
        WITNESS_MAGIC WITNESS_REGIONS_MAX WITNESS_PAGES_MAX WITNESS_NAME_BYTES
        WITNESS_OFFSET_MAGIC WITNESS_OFFSET_COUNT WITNESS_OFFSET_REGIONS
        WITNESS_REGION_BYTES WITNESS_REGION_NAME WITNESS_REGION_PAGES WITNESS_REGION_CRC32
        WITNESS_REGION_GFN_LIST
    }
    writeln!(header, "#define NOTE_NAME {:?}", abi::NOTE_NAME).expect("writing to a string");
    header
}

impl Tree {
    /// Compiles one file to `object`.
    fn compile(&self, source: &Path, object: &Path, more: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.compiler);
        command.args(FLAGS).arg("-I").arg(&self.out).arg("-I").arg(&self.kernel);
        command.arg("-I").arg(&self.user).arg(format!("-fmacro-prefix-map={}/=", self.kernel.display()));
        // Where .incbin finds the programs.
        command.arg("-Wa,-I").arg(format!("-Wa,{}", self.out.display()));
        command.args(more).arg("-c").arg(source).arg("-o").arg(object);
        self.run(command)
    }

    fn link(&self, script: &Path, objects: &[PathBuf], image: &Path, more: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.compiler);
        command.args(LINK_FLAGS).args(more).arg("-T").arg(script).args(objects).arg("-o").arg(image);
        self.run(command)
    }

    fn link_program(&self, program: &Program) -> Result<()> {
        let mut objects = Vec::new();
        let flags: &[&str] = if program.name == "reclaim" { FRAME_POINTERS } else { &[] };
        for file in ["start.S", "user.c"].iter().chain(program.files) {
            let object = self.out.join(format!("user-{file}.o"));
            self.compile(&self.user.join(file), &object, flags)?;
            objects.push(object);
        }
        let image = self.out.join(format!("{}.user", program.name));
        self.link(&self.user.join("program.ld"), &objects, &image, &["-s", "-Wl,-n"])
    }

    /// Every `.c` and `.S` of the kernel, in the order of their names: (file name, object).
    fn compile_kernel(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut files: Vec<String> = fs::read_dir(&self.kernel)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        files.retain(|file| file.ends_with(".c") || file.ends_with(".S"));
        files.sort();
        let mut objects = Vec::new();
        for file in files {
            // The linker script finds early.o and cmdline.o by these names.
            let stem = file.rsplit_once('.').map_or(file.as_str(), |(stem, _)| stem);
            let object = self.out.join(format!("{}.o", if file.ends_with(".S") { &file } else { stem }));
            self.compile(&self.kernel.join(&file), &object, &[KERNEL_CALLS])?;
            objects.push((file, object));
        }
        Ok(objects)
    }

    fn link_image(&self, image: &Image, kernel: &[(String, PathBuf)]) -> Result<()> {
        let mut objects = kernel.to_vec();
        match image.variant {
            Variant::None => {}
            Variant::Without { file } => objects.retain(|(name, _)| name != file),
            Variant::Define { file, define } => {
                let object = self.out.join(format!("{}-{file}.o", image.name));
                self.compile(&self.kernel.join(file), &object, &[KERNEL_CALLS, &format!("-D{define}")])?;
                objects.retain(|(name, _)| name != file);
                objects.push((file.to_owned(), object));
            }
        }
        let objects: Vec<PathBuf> = objects.into_iter().map(|(_, object)| object).collect();
        let elf = self.out.join(format!("{}.elf", image.name));
        self.link(&self.kernel.join("kernel.ld"), &objects, &elf, &[])
    }

    /// Runs the compiler; its failure is told in one sentence with all that it printed.
    fn run(&self, mut command: Command) -> Result<()> {
        let output = command.output().map_err(|error| {
            format!(
                "the guest kernel is C and needs a C compiler: running `{}` failed: {error}. Install gcc (Debian: apt \
                 install gcc), or name a compiler in UMBRA_GUEST_CC.",
                self.compiler
            )
        })?;
        if output.status.success() {
            return Ok(());
        }
        // One line: cargo::error ends at a newline. What the compiler said goes before it, in full.
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " | ");
        Err(format!(
            "building the guest kernel failed ({}): ran {command:?}; it printed: {said}. It takes a gcc 8 or later for \
             x86 that knows -m32 (no 32-bit C library is needed), and GNU as and ld: apt install gcc binutils.",
            output.status
        )
        .into())
    }
}
