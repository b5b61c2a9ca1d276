//! Images of many kinds, made by `qemu-img` and `qemu-io`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

pub(crate) fn scratch(name: &str) -> PathBuf {
    // Each test of this file may run in a process of its own, at the same time.
    let mine = format!("{name}-{}", std::process::id());
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(mine);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

pub(crate) fn run(dir: &Path, program: &str, args: &[&str]) -> (bool, String) {
    let out = Command::new(program).args(args).current_dir(dir).output();
    let out = out.unwrap_or_else(|error| panic!("{program} must be installed: {error}"));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    (out.status.success(), text + &String::from_utf8_lossy(&out.stderr))
}

/// One image to begin with: options, size, then what `qemu-io` and `qemu-img` do to it.
pub(crate) type Recipe = (&'static str, &'static str, &'static str, &'static [&'static str]);

const WRITES: &[&str] = &["io write 0 20k", "io write 100k 3k", "io write -z 8k 4k"];
const SPARSE: &[&str] = &["io write 0 70k", "io write 600k 64k", "io discard 64k 64k"];
const SNAPSHOTS: &[&str] = &[
    "io write 0 16k",
    "img snapshot -c one FILE",
    "io write 4k 8k",
    "io write 40k 8k",
    "img snapshot -c two FILE",
    "io write 0 4k",
    "img snapshot -d one FILE",
];
const BITMAPS: &[&str] = &[
    "io write 0 16k",
    "img bitmap --add -g 512 FILE b0",
    "io write 4k 8k",
    "img bitmap --add -g 512 FILE b1",
    "io write 50k 9k",
];
const MANY: &[&str] = &[
    "io write -c 0 16k",
    "img snapshot -c one FILE",
    "img bitmap --add -g 512 FILE b0",
    "io write 4k 8k",
    "io write -z 40k 8k",
];
const COMPRESSED: &[&str] = &["io write -c 0 16k", "io write -c 32k 4k", "io write 64k 4k"];

const RECIPES: &[Recipe] = &[
    ("v2", "compat=0.10,cluster_size=512", "200k", WRITES),
    ("v2-4k", "compat=0.10,cluster_size=4k", "1M", SPARSE),
    ("v3", "cluster_size=512", "200k", WRITES),
    ("v3-1k", "cluster_size=1k", "1M", SPARSE),
    ("v3-4k", "cluster_size=4k", "1M", SPARSE),
    ("v3-64k", "cluster_size=64k", "4M", SPARSE),
    ("v3-2m", "cluster_size=2M", "64M", SPARSE),
    ("empty", "cluster_size=512", "64k", &[]),
    ("meta", "cluster_size=512,preallocation=metadata", "200k", WRITES),
    ("full", "cluster_size=4k,preallocation=full", "256k", WRITES),
    ("lazy", "cluster_size=4k,lazy_refcounts=on", "1M", SPARSE),
    ("rc1", "cluster_size=512,refcount_bits=1", "200k", WRITES),
    ("rc2", "cluster_size=512,refcount_bits=2", "200k", SNAPSHOTS),
    ("rc4", "cluster_size=512,refcount_bits=4", "200k", SNAPSHOTS),
    ("rc8", "cluster_size=512,refcount_bits=8", "200k", SNAPSHOTS),
    ("rc32", "cluster_size=512,refcount_bits=32", "200k", SNAPSHOTS),
    ("rc64", "cluster_size=512,refcount_bits=64", "200k", SNAPSHOTS),
    ("snap-v2", "compat=0.10,cluster_size=512", "200k", SNAPSHOTS),
    ("snap", "cluster_size=512", "200k", SNAPSHOTS),
    ("snap-4k", "cluster_size=4k", "1M", SNAPSHOTS),
    ("packed", "cluster_size=512", "200k", COMPRESSED),
    ("packed-4k", "cluster_size=4k", "200k", COMPRESSED),
    ("packed-64k", "cluster_size=64k", "1M", &["io write -c 0 128k", "io write -c 512k 64k"]),
    ("zstd", "cluster_size=4k,compression_type=zstd", "200k", COMPRESSED),
    ("packed-snap", "cluster_size=4k", "200k", &["io write -c 0 16k", "img snapshot -c s FILE"]),
    ("ext", "cluster_size=16k,extended_l2=on", "1M", SPARSE),
    ("ext-snap", "cluster_size=16k,extended_l2=on", "1M", SNAPSHOTS),
    ("ext-packed", "cluster_size=16k,extended_l2=on", "1M", &["io write -c 0 64k"]),
    ("data", "cluster_size=4k,data_file=data.raw", "1M", SPARSE),
    ("bitmap", "cluster_size=512", "200k", BITMAPS),
    ("bitmap-4k", "cluster_size=4k", "200k", BITMAPS),
    ("bitmap-64k", "cluster_size=64k", "1M", BITMAPS),
    ("over", "cluster_size=4k,backing_file=beneath.raw,backing_fmt=raw", "1M", SPARSE),
    ("many", "cluster_size=4k,compression_type=zstd,refcount_bits=8", "200k", MANY),
    ("luks", LUKS, "200k", &[]),
];
const LUKS: &str = "cluster_size=64k,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";

/// Makes the image of a recipe and returns its bytes.
pub(crate) fn make(dir: &Path, (name, options, size, steps): Recipe) -> Vec<u8> {
    let file = format!("{name}.base");
    if options.contains("beneath.raw") {
        std::fs::write(dir.join("beneath.raw"), vec![7; 1 << 20]).unwrap();
    }
    let secret = "secret,id=s,data=open";
    let args = ["create", "-q", "-f", "qcow2", "--object", secret, "-o", options, &file, size];
    let (ok, text) = run(dir, "qemu-img", &args);
    assert!(ok, "{name}: {text}");
    for step in steps {
        let step = step.replace("FILE", &file);
        let (ok, text) = match step.split_once(' ').unwrap() {
            ("io", command) => run(dir, "qemu-io", &["-f", "qcow2", "-c", command, &file]),
            (_, args) => run(dir, "qemu-img", &args.split(' ').collect::<Vec<_>>()),
        };
        assert!(ok && !text.contains("rror"), "{name}: {step}: {text}");
    }
    std::fs::read(dir.join(file)).unwrap()
}

/// The image of one recipe, made in a folder of its own.
pub(crate) fn base(name: &str) -> Vec<u8> {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    let dir = scratch(&format!("check-{name}-{}", MADE.fetch_add(1, Relaxed)));
    make(&dir, *RECIPES.iter().find(|recipe| recipe.0 == name).unwrap())
}

/// An image, with its name.
pub(crate) type Base = (&'static str, Vec<u8>);

/// The directory of the images, and the images.
pub(crate) fn bases() -> (&'static Path, &'static [Base]) {
    static BASES: OnceLock<(PathBuf, Vec<Base>)> = OnceLock::new();
    let (dir, bases) = BASES.get_or_init(|| {
        let dir = scratch("check-images");
        for entry in std::fs::read_dir(made_once()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
        }
        let read = |name: &str| std::fs::read(dir.join(format!("{name}.base"))).unwrap();
        let bases = RECIPES.iter().map(|recipe| (recipe.0, read(recipe.0))).collect();
        (dir, bases)
    });
    (dir, bases)
}

/// A directory with the image of each recipe, made once for all tests and runs: they take a while.
fn made_once() -> PathBuf {
    let (_, version) = run(Path::new("."), "qemu-img", &["--version"]);
    let mut hasher = DefaultHasher::new();
    (RECIPES, version).hash(&mut hasher);
    let shared = format!("check-bases-{:x}", hasher.finish());
    let shared = Path::new(env!("CARGO_TARGET_TMPDIR")).join(shared);
    if !shared.exists() {
        let dir = scratch("check-make");
        for &recipe in RECIPES {
            make(&dir, recipe);
        }
        // Another process may have been faster; then there are its images.
        let renamed = std::fs::rename(&dir, &shared);
        assert!(renamed.is_ok() || shared.exists(), "{renamed:?}");
    }
    shared
}
