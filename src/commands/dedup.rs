//! `fulgurite dedup`

use anyhow::Result;
use dedup::near::{Estimate, estimate};

use crate::cli::{Dedup, DedupPlan};
use crate::output::{self, thousands};
use crate::recipe::Recipe;
use crate::source::Source;

/// Print what deduplication comes to.
pub fn dedup(args: &Dedup) -> Result<()> {
    match args {
        Dedup::Plan(args) => plan(args),
    }
}

fn plan(args: &DedupPlan) -> Result<()> {
    let config = match &args.recipe {
        None => dedup::NearConfig::default(),
        Some(path) => {
            let source = Source::read(path, &args.set)?;
            let near = Recipe::load(&source)?.near.ok_or_else(|| source.refuse("there is no [near] table to plan"))?;
            near.check().map_err(|e| source.explain(e))?;
            near
        }
    };
    let plan = estimate(&config, args.documents, args.bytes_per_document);
    if args.json {
        return output::json(&plan);
    }
    output::line(format!(
        "{} documents, {} words a shingle, {} bands of {} permutations, mode {}\n",
        thousands(plan.documents),
        config.ngram,
        config.bands,
        config.rows,
        config.mode.name()
    ))?;
    output::line(curve(&plan))?;
    output::line(format!("\nhalf of the pairs of similarity {:.3} are found\n", plan.half_found_at))?;
    let mut rows = vec![vec!["stage".to_string(), "disk".into()]];
    rows.extend(plan.disk.iter().map(|s| vec![s.stage.clone(), output::bytes(s.bytes)]));
    rows.push(vec!["in all".into(), output::bytes(plan.disk_bytes)]);
    output::line(output::table(&rows))?;
    Ok(output::line(format!(
        "\n{:.0} bytes of signatures a document; the rest for {:.0}% of the documents in pairs, {} bytes of text each\n\
         memory: {} a task of near_pairs, {} for the union-find; {} tasks, as many at a time as --memory-limit has room for",
        plan.signature_bytes_per_document,
        100.0 * plan.expected_duplicates,
        thousands(plan.bytes_per_document),
        output::bytes(plan.memory_per_thread_bytes),
        output::bytes(plan.union_find_bytes),
        thousands(plan.pair_tasks)
    ))?)
}

fn curve(plan: &Estimate) -> String {
    let mut rows = vec![["similarity", "expected recall", "after verification"].map(String::from).to_vec()];
    rows.extend(plan.curve.iter().map(|point| {
        vec![
            format!("{:.2}", point.similarity),
            format!("{:.2}%", 100.0 * point.found),
            format!("{:.2}%", 100.0 * point.kept),
        ]
    }));
    output::table(&rows)
}
