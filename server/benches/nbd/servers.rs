//! The servers that are compared: how each is started, and what it costs.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// One way to serve a file.
pub struct Kinds {
    pub name: &'static str,
    program: &'static str,
    /// Arguments, separated by spaces; `{file}`, `{port}`, `{config}` and `{pid}` (of one that goes into the background) are filled in.
    arguments: &'static str,
    /// Lines of a configuration file in which `{file}` and `{port}` are filled in.
    config: &'static str,
}

/// Through the page cache, as all are measured; `--aio=native` is only for `O_DIRECT`.
const QEMU: [&str; 2] = [
    "-t -e 16 -f raw -x disk --aio=io_uring -b 127.0.0.1 -p {port} {file}",
    "-t -e 16 -f raw -x disk --aio=threads -b 127.0.0.1 -p {port} {file}",
];
/// How a build of this benchmark serves.
const SERVE: &str = "serve 127.0.0.1:{port} {file}";
/// How the program that users get serves.
const NBD: &str = "nbd --listen 127.0.0.1:{port} --name disk {file}";

/// All of them; ours first, which is `program` if there is one.
pub fn known(program: Option<&str>) -> Vec<Kinds> {
    let qemu = |name, arguments| Kinds {
        name,
        program: "qemu-nbd",
        arguments,
        config: "",
    };
    let nbd_server = |name, config| Kinds {
        name,
        program: "nbd-server",
        arguments: "-C {config} -p {pid}",
        config,
    };
    vec![
        Kinds {
            name: "stiefel",
            // For the life of the benchmark.
            program: program.map_or("", |program| &*String::leak(program.to_owned())),
            arguments: if program.is_some() { NBD } else { SERVE },
            config: "",
        },
        Kinds {
            name: "nbdkit file",
            program: "nbdkit",
            arguments: "-f -i 127.0.0.1 -p {port} file {file}",
            config: "",
        },
        qemu("qemu-nbd io_uring", QEMU[0]),
        qemu("qemu-nbd threads", QEMU[1]),
        nbd_server(
            "nbd-server",
            "[generic]\nlistenaddr = 127.0.0.1\nport = {port}\n[disk]\nexportname = {file}\nflush = true\nfua = true\n",
        ),
        nbd_server(
            "nbd-server splice",
            "[generic]\nlistenaddr = 127.0.0.1\nport = {port}\n[disk]\nexportname = {file}\nflush = true\nfua = true\nsplice = true\n",
        ),
    ]
}

impl Kinds {
    /// Another build of our own benchmark or engine.
    pub fn other(program: &str) -> Self {
        // For the life of the benchmark.
        let program = String::leak(program.to_owned());
        Self {
            name: program,
            program,
            arguments: SERVE,
            config: "",
        }
    }

    /// Whether it is installed; says so if not.
    pub fn present(&self) -> bool {
        let found = self.program.is_empty() || Command::new(self.program).arg("--version").output().is_ok();
        if !found {
            eprintln!("left out: {} is not installed (try --install)", self.program);
        }
        found
    }

    /// The version as the program says it.
    pub fn version(&self) -> String {
        let output = Command::new(self.program).arg("--version").output();
        let text = output.map_or_else(|_| Vec::new(), |output| [output.stdout, output.stderr].concat());
        String::from_utf8_lossy(&text)
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned()
    }
}

/// A server that accepts connections; killed when dropped.
pub struct Running {
    child: Child,
    /// The first process of the server: the child, or what it left behind in the background.
    first: u32,
    pub address: SocketAddr,
}

impl Running {
    pub fn start(kind: &Kinds, file: &Path) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let (config, pid) = (file.with_extension("conf"), file.with_extension("pid"));
        let fill = |text: &str| {
            text.replace("{file}", file.to_str().unwrap())
                .replace("{port}", &address.port().to_string())
                .replace("{config}", config.to_str().unwrap())
                .replace("{pid}", pid.to_str().unwrap())
        };
        std::fs::write(&config, fill(kind.config)).unwrap();
        let own = std::env::current_exe().unwrap();
        let program = if kind.program.is_empty() {
            own.as_path()
        } else {
            Path::new(kind.program)
        };
        let child = Command::new(program)
            .args(kind.arguments.split(' ').map(fill))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let first = child.id();
        let mut running = Self { child, first, address };
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "{} does not listen",
                kind.name
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        std::fs::remove_file(config).unwrap();
        if let Ok(text) = std::fs::read_to_string(&pid) {
            running.first = text.trim().parse().unwrap();
            std::fs::remove_file(pid).unwrap();
        }
        running
    }

    /// The server's processes: itself and its descendants.
    fn processes(&self) -> Vec<u32> {
        let mut found = vec![self.first];
        let mut at = 0;
        while let Some(id) = found.get(at) {
            let tasks = std::fs::read_dir(format!("/proc/{id}/task"))
                .into_iter()
                .flatten()
                .flatten();
            for task in tasks.collect::<Vec<_>>() {
                let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
                found.extend(children.split_whitespace().filter_map(|id| id.parse::<u32>().ok()));
            }
            at += 1;
        }
        found
    }

    /// CPU seconds so far, user and system, of all its processes.
    pub fn cpu(&self) -> f64 {
        let ticks = |id: &u32| {
            let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
            // utime and stime (proc(5)), counted from the field after the name.
            (11..13)
                .filter_map(|field| fields.get(field)?.parse::<f64>().ok())
                .sum::<f64>()
        };
        self.processes().iter().map(ticks).sum::<f64>() / 100.0
    }

    /// Peak resident MiB, summed over its processes.
    pub fn memory(&self) -> f64 {
        let peak = |id: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok())
                .unwrap_or(0.0)
        };
        self.processes().iter().map(peak).sum::<f64>() / 1024.0
    }

    /// Ends it.
    pub fn stop(self) {}
}

impl Drop for Running {
    fn drop(&mut self) {
        for id in self.processes() {
            // By number: these are our own children.
            let _ = Command::new("kill")
                .args(["-9", &id.to_string()])
                .stderr(Stdio::null())
                .status();
        }
        let _ = self.child.wait();
    }
}
